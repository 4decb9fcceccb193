"""`qpipe --help` and `qpipe COMMAND --help`: a screen each, of 24 lines; the first also of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

_EXIT = {
    "run": """\
0 done; 1 a node failed; 2 the config or an input is wrong; 3 the goal was not met; 4 run.expect or
         run.max_misses forbade it; 5 run.budget_s was spent; 130 interrupted""",
    "plan": "0; 2 the config is wrong; 4 run.expect or run.max_misses would forbid the run",
    "rerun": "0 and the others as of `qpipe run`; 2 also where there is no such run",
    "why": "0; 2 the config, the node or the run is wrong",
    "diff": "0 both made the same; 1 they did not; 2 a run is not to be found",
    "verify": "0 all is reproducible; 1 anything is not; 2 the config is wrong, or nothing is in the cache",
    "graph": "0; 2 the config is wrong",
    "stages": "0; 2 there is no such stage",
    "report": "0; 2 there is no such run",
    "runs": "0; 2 a word is wrong",
    "cache": "0; 1 the cache is damaged or cannot be used; 2 the command or the config is wrong",
}

_TEXT = {
    "run": """\
usage: qpipe [run] [OVERRIDE …] [-m] [--resume FOLDER]

Carry the pipeline out: what the cache has is taken from there, the rest runs.

  pipeline=ptq|adaround|amp|autoquant   scheme=w8a8|w4a8|…   model=onnx_file model.path=net.onnx   data=npz …
  stages.NODE.PARAM=VALUE    any param of any node; stages.NODE.enabled=false takes a node out
  -m                         a sweep: scheme=w8a8,w4a8 runs both, as one graph; -m search=NAME searches
  --resume FOLDER            go on with the sweep or the search that lies in FOLDER, with further OVERRIDEs
  run.workers=N run.threads=N run.device=cpu|cuda run.keep_going=false run.timeout_s=S
  run.expect=cached          run nothing; status 4 if anything would have to run
  run.max_misses=N           status 4, before anything runs, if more than N nodes would have to
  run.budget_s=S             begin nothing more after S seconds; status 5, and the same command goes on

`qpipe --cfg job` shows the whole config, `qpipe --hydra-help` Hydra's options. What a run leaves:
outputs/<date>/<time>-<id>/.
""",
    "plan": """\
usage: qpipe plan [OVERRIDE …] [-m]

Say what would run and why, what the cache has, and what it would cost by what the nodes took before: each node,
all together, on the workers at hand, and the longest way. Runs nothing.

A node in `wait` may run: its inputs are not known yet, and if they come out as before it is a hit.
""",
    "rerun": """\
usage: qpipe rerun RUN [OVERRIDE …]

Carry out again the config that RUN recorded, whatever the config files say by now: what the cache still has is taken
from there. `qpipe diff RUN last` says whether the same came of it.

  RUN        a run folder, a record.json, a name below outputs/, `last`, or `last~1` for the one before it
  OVERRIDE   any value: stages.NODE.PARAM=VALUE, scheme.weight.bitwidth=4, and the groups scheme, target, run, cache

Paths and modules are found from the working directory, as in the run.
""",
    "why": """\
usage: qpipe why NODE [--against RUN] [OVERRIDE …]

Say why NODE runs: which ingredient of its key changed, old and new value, and for an input what changed in the node
that made it, up to the roots. Then all that the key is made of.

  --against RUN    compare with that run instead of the nearest earlier result: a run folder, a record.json, a name
                   below outputs/, `last`, or `last~1` for the one before it
""",
    "diff": """\
usage: qpipe diff RUN RUN [--json]

Say how two runs differ: nodes only in one, keys and the ingredients that differ, scores, config, environment, time.

  RUN      a run folder, a record.json, a name below outputs/, `last`, or `last~1` for the one before it
  --json   the same as JSON

Time, hits, the environment, and options that no key holds may differ in runs that made the same.
""",
    "verify": """\
usage: qpipe verify NODE|all [--repeat N] [OVERRIDE …]

Compute NODE, or every cached node, again and compare with the cached result bit for bit. Each computation has a process
of its own, the threads and the device of the first time, and no sub-results; the cache stays as it is.

  --repeat N   how often (2)
""",
    "graph": """\
usage: qpipe graph [FILE.svg|FILE.png] [OVERRIDE …]

Print the pipeline with its verdicts, or draw it to FILE.
""",
    "stages": """\
usage: qpipe stages [NAME]

List the stages, or show one with its ports and params, their types and defaults, and what each means.
""",
    "report": """\
usage: qpipe report [RUN]

Show the closing table of a run again and write its report.html; without RUN, of the last one.
""",
    "runs": """\
usage: qpipe runs [FOLDER] [--sort BY] [--where KEY=VALUE …] [--json]

All runs and trials below FOLDER (outputs), the newest first: what they were asked for where that differs, their score,
what they lost against float, and the processor time that they took.

  --sort BY           started, score, drop, cpu, name, or the address of an override
  --where KEY=VALUE   those with this override, or with this status, metric or name; may be given again
  --json              the same as JSON
""",
    "cache": """\
usage: qpipe cache COMMAND [OVERRIDE …]

  ls                           the results, what was used last first
  du                           what takes how much
  gc                           remove what nothing refers to, and, above cache.max_size, what was not used for longest
  verify                       read every blob and every result against its digest
  rm NODE|KEY…|--stage STAGE   forget results
  pin [RUN|NODE|KEY…], unpin   what gc leaves alone; without a name, what is pinned
  export FILE                  what this pipeline reaches, as an archive
  import FILE                  take an archive in, verified

  cache.dir=FOLDER (or QPIPE_CACHE_DIR)   cache.max_size=20GB
""",
}

COMMANDS = tuple(_TEXT)

_OVERVIEW = """\
usage: qpipe [COMMAND] [OVERRIDE …] [-m]     post-training quantization, cached
  run             carry the pipeline out (the default); COMMAND --help says more
  plan            say what would run, why, and what it costs; runs nothing
  rerun RUN       carry out again the config that a run recorded
  why NODE        say which part of a node's key changed, up to the roots
  diff RUN RUN    say how two runs differ
  verify NODE     compute cached nodes again and compare bit for bit
  graph [FILE]    print the pipeline, or draw it to FILE (.svg or .png)
  stages [NAME]   list the stages, or show one with its ports and params
  report [RUN]    show the record of a run again (without RUN, of the last)
  runs [FOLDER]   all runs and trials side by side
  cache           ls, du, gc, verify, rm, pin, unpin, export, import
An OVERRIDE is ADDRESS=VALUE (stages.adaround.iterations=500) or GROUP=OPTION:
{groups}
A sweep: -m scheme=w8a8,w4a8. Files of your own: --config-dir DIR pipeline=mine.
"""
_LISTED = ("model", "data", "scheme", "target", "pipeline", "experiment")
_COLUMNS = 80


def overview(groups: Mapping[str, Sequence[str]]) -> str:
    """`qpipe --help`; `groups` are {group: its options}."""
    lines = []
    for group in _LISTED:
        options, left = ", ".join(groups.get(group, ())), f"  {group:<12}"
        wrapped = textwrap.wrap(options, _COLUMNS - len(left), max_lines=2, placeholder=" …")
        lines += textwrap.indent("\n".join(wrapped), len(left) * " ").replace(len(left) * " ", left, 1).splitlines()
    return _OVERVIEW.format(groups="\n".join(lines))


OPTIONS: dict[str, dict[str, str]] = {
    "run": {"--resume": "FOLDER"},
    "why": {"--against": "RUN"},
    "verify": {"--repeat": "N"},
    "diff": {"--json": ""},
    "runs": {"--json": "", "--sort": "BY", "--where": "KEY=VALUE"},
}
"""Of each command its own options, and what their values are called."""


def usage(command: str) -> str:
    """The help of `command`."""
    return f"{_TEXT[command]}\nExit status: {_EXIT[command]}\n"
