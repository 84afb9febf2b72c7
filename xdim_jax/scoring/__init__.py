"""Scores of segmentations by the rules of the challenges (docs/challenges.md), in numpy and scipy.

    masks     two masks: overlap and surface distances, every definition by its name
    lesions   BraTS 2023 and 2024: lesion by lesion
    simpson   CAMUS: volumes of the left ventricle from two views
    camus, chaos, brats, generic    what each challenge measures, on which structures, and what it does with empty masks
    rules     the challenges by name; scoring of one case
    results   the files that come of it, and their summary
    tables    the paper's tables, its row beside ours
    compare   two runs, case by case

This package judges the product, so it shares none of its code for labels, regions and post-processing: label values
stand here again.
"""
