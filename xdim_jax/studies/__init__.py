"""Studies: runs that differ in some settings (arms), with several training-set sizes and seeds, and their comparison."""
