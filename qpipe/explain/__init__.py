"""Why a node runs, how two runs differ, and whether a result can be had again."""
