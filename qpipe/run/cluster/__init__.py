"""Actions carried out on a cluster that exists: Dask or Ray, behind one small protocol."""
