"""Actions carried out: contexts, workers, the executor, sweeps and records. The only part that writes results."""
