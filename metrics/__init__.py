"""Scores as pure functions on strings, each by the rule of its benchmark. The errors of the official programs are kept.
tests/test_benchmarks.py compares the scores with values of these programs. docs/evaluation.md has a table of all tasks.

    words       exact match, VQA accuracy, GQA                        yes_no      POPE, MME
    letters     MMStar, MMBench, ScienceQA, AI2D, SEED-Bench          mmmu        MMMU
    reading     ChartQA, DocVQA, InfoVQA, OCRBench                    captions    CIDEr-D of COCO and NoCaps
    boxes       RefCOCO                                               certainty   confidence intervals, paired tests
    tasks       the table of all tasks; evaluate(), compare()
"""
