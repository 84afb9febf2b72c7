"""Scoring of segmentations by the rules of the challenges (docs/challenges.md), with NumPy and SciPy.

    masks       metrics of two masks: overlap and surface distances
    lesions     lesion-wise metrics of BraTS 2023 and 2024
    simpson     volumes of the left ventricle from two views, for CAMUS
    rules       data structures for the rules of a challenge; scoring of one case
    camus, chaos, brats, generic
                the rules of each challenge: metrics, structures, empty masks
    challenges  selection of rules by name, and their command-line options
    evaluation  scoring of all cases, in several processes
    folders     evaluation of a folder of predictions against a folder of references
    calibration calibration of probabilities, and usefulness of uncertainty maps
    results     result files, and statistics over cases
    tables      the tables of the paper with the rows of an evaluation added, and tables of all metrics
    paired      statistics of two evaluations of the same cases
    comparison  the table of the statistics of `paired`
    submission  conversion of predictions to the files that a challenge expects

These modules score the output of the other parts of `xdim_jax`. They do not use the definitions of label values,
regions and post-processing in those parts, but have their own, so that an error there does not also affect the scores.
Only `masks.region_dice` and `masks.dice_of_counts`, for validation in training, have the regions of the data set.
"""
