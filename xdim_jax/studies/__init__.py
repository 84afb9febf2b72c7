"""Studies: comparisons of runs that differ in some settings (arms), over numbers of training patients and seeds."""
