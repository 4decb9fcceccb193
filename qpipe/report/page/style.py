"""The style sheet of report.html; light or dark as the reader's system is."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2430; --faint: #5d6672; --line: #dfe3e9;
  --panel: #f6f7f9;
  --blue: #3b6fb6; --green: #3a8f5c; --amber: #a67a0c; --red: #c2453a; --allowed: #e2f3e7; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --ink: #e4e8ee; --faint: #97a1af;
  --line: #2d333c;
  --panel: #1c2027; --blue: #7aa7e6; --green: #62bd86; --amber: #d9b04a; --red: #e8796e; --allowed:
  #1b3325; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 32px 24px 64px; max-width: 1120px; background: var(--paper); color:
  var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 26px; line-height: 1.25; margin: 4px 0 6px; }
h2 { font-size: 18px; margin: 40px 0 12px; padding-bottom: 6px; border-bottom: 1px solid var(--line); }
p { margin: 6px 0; }
code, pre, .mono { font-family: ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", Consolas,
  monospace;
  font-size: 13px; overflow-wrap: anywhere; }
pre { background: var(--panel); padding: 10px 12px; border-radius: 6px; white-space: pre-wrap; margin:
  6px 0; }
a { color: var(--blue); }
.faint { color: var(--faint); fill: var(--faint); }
.badge { display: inline-block; padding: 1px 8px; border-radius: 10px; font-size: 12px; line-height: 18px;
  border: 1px solid currentColor; color: var(--faint); white-space: nowrap; }
.hit, .done { color: var(--green); } .ran, .run { color: var(--blue); }
.wait, .goal_missed, .interrupted { color: var(--amber); } .failed { color: var(--red); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin:
  20px 0; }
.card { background: var(--panel); border-radius: 8px; padding: 12px 14px; }
.card b { display: block; font-size: 20px; font-weight: 600; overflow-wrap: anywhere; line-height: 1.3; }
.card span { color: var(--faint); font-size: 13px; }
.scroll { overflow-x: auto; }
.graph svg { max-width: 100%; height: auto; display: block; }
.graph { background: #fff; border: 1px solid var(--line); border-radius: 8px; }
.chart { width: 100%; max-width: 900px; height: auto; font-size: 13px; fill: var(--ink); }
.chart .grid { stroke: var(--line); fill: none; } .chart .stem { stroke: var(--faint); stroke-width:
  1.5; fill: none; }
.chart .float { stroke: var(--ink); stroke-dasharray: 4 3; fill: none; } .chart .allowed { fill:
  var(--allowed); }
.chart .faint { fill: var(--faint); } .chart .strong { font-weight: 600; }
.dot.plain { fill: var(--blue); } .dot.best { fill: var(--green); } .dot.baseline { fill: var(--ink); }
.chart .near { fill: var(--green); } .chart .far { fill: var(--amber); }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 500; color: var(--faint); font-size: 13px; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.right, th.right { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.best td { font-weight: 600; }
.node { border-bottom: 1px solid var(--line); }
.columns { display: grid; gap: 12px; padding: 6px 0;
  grid-template-columns: minmax(140px, 1.3fr) minmax(90px, 1fr) 96px 84px 84px 84px minmax(0, 2fr); }
.columns > * { overflow-wrap: anywhere; }
.head { color: var(--faint); font-size: 13px; border-bottom: 1px solid var(--line); }
summary { cursor: pointer; list-style: none; } summary::-webkit-details-marker { display: none; }
summary:hover { background: var(--panel); }
summary .name::before { content: "▸ "; color: var(--faint); } [open] > summary .name::before { content:
  "▾ "; }
.body { padding: 4px 0 16px 18px; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 3px 18px; margin: 6px 0; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
ul { margin: 6px 0; padding-left: 20px; }
@media (max-width: 760px) { .columns { grid-template-columns: 1.4fr 96px 84px; }
  .columns > :nth-child(2), .columns > :nth-child(n+5) { display: none; } }
"""
