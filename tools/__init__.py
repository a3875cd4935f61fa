"""Small programs around training. Each one is started with `python -m tools.NAME`, and `--help` explains it:

    check_data    check a data file; `python data.py` starts it, too       report         show answers and images
    plot          draw the curves of runs                                  export_gguf    write files for llama.cpp
    retrieval     recall and zero-shot classes of two towers
    curate        filter data; make data from captions
    look          page of one answer: probabilities, attention             serve          answer over HTTP; a chat page
    harness_lmms  let lmms-eval ask a model                                harness_vlmeval    let VLMEvalKit ask a model
"""
