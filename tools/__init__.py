"""Programs beside training.

    python data.py FILE --images=DIR --model=DIR             check a data file (check_data.py)
    python -m tools.export_gguf DIR                          a LLaVA folder for llama.cpp
    python -m tools.plot RUN [RUN ...]                       curves of runs
    python -m tools.report ANSWERS.jsonl --images=DIR        a page of answers with their images
"""
