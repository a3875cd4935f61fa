"""Files of questions, in the forms in which benchmarks are published. All become one list of questions.

    jsonl or a json list        LLaVA's question_id, image, text and, if known, answer, answers or label; or names like
                                question, options, answer ... (OCRBench, ChartQA, VizWiz, RefCOCO)
    json with all in an object  VQAv2 (QUESTIONS.json,ANNOTATIONS.json), TextVQA, DocVQA, InfoVQA, SEED-Bench (without
                                its videos), GQA (balanced ones), ScienceQA (test), COCO and NoCaps captions
    tsv                         VLMEvalKit's: index, image in base64, question, hint, A to D, answer, category
    parquet                     lmms-lab's and the benchmarks' own on the Hugging Face hub (needs pyarrow); a pattern of
                                such files; GQA of lmms-lab (QUESTIONS.parquet,IMAGES.parquet)
    folder                      MME: CATEGORY/questions_answers_YN/NAME.txt and CATEGORY/images/NAME.jpg

A question is a dict:

    question_id, text     text is the whole prompt: hint, question, options and the instruction of LLaVA-1.5
    image                 None, a file name, bytes, Stored (its place in a parquet file), or a tuple of these: then text
                          has an <image> marker for each
    answers               list of true answers; empty if the file has none
    type, options, group, dataset, size        as metrics/tasks.py says; only where the task needs them

A `text` is asked as it is. A `question` gets its options and the instruction of the task."""

from formats.questions.parquet import image_bytes
from formats.questions.read import read_questions
from formats.questions.variants import choose_examples, example_answer

__all__ = ["choose_examples", "example_answer", "image_bytes", "read_questions"]
