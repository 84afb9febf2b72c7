"""Studies: runs that differ in some settings (arms), for several training-set sizes and seeds, and their comparison."""
