"""The six exercises. Each one breaks one place of a file of the repository, and names the tests that fail then.

    file, old, new   in `file`, the text `old` occurs exactly once; the exercise has `new` in its place
    tests            existing tests (below tests/) that judge the repaired file
    world            what a practitioner sees
    hint             where to look
    explained        where the right code and its reason stand
"""

from typing import NamedTuple


class Exercise(NamedTuple):
    title: str
    file: str
    old: str
    new: str
    tests: tuple
    world: str
    hint: str
    explained: str


TASKS = {
    "labels": Exercise(
        "shifted labels", "data.py",
        "for y in [*labels[1:], IGNORE]]", "for y in labels]",
        ("test_data.py::test_a_packed_stream_keeps_its_samples_apart",
         "test_data.py::test_the_first_token_is_never_supervised"),
        "The training loss of stage 2 falls far below that of any paper. Then the model is asked something, and its "
        "answer repeats one token without end.",
        "Position n must predict token n + 1. Look for the line that makes the labels of a stream from the labels of "
        "its samples. Which label belongs to the last position of a sample?",
        "data.py, pack() and class Batch; docs/lecture/sample.svg"),
    "mean": Exercise(
        "mean of means", "loss.py",
        """return float(batch.weights.double().sum()) if len(batch.weights) else supervised(batch.labels)


def token_loss(model, batch):
    \"\"\"-> scalar: the sum of -weight * log p(label) over the supervised tokens of the data.Batch\"\"\"
    return model(*batch, head=linear_cross_entropy)
""",
        """return 1.0


def token_loss(model, batch):
    \"\"\"-> scalar: the sum of -weight * log p(label) over the supervised tokens of the data.Batch\"\"\"
    return model(*batch, head=linear_cross_entropy) / max(1, supervised(batch.labels))
""",
        ("test_distributed.py::test_micro_batches_packed_anyhow_give_one_gradient",
         "test_loss.py::test_weights_of_zero_train_on_the_rest"),
        "The same command gives another loss curve on eight GPUs than on one, and another one when max_tokens "
        "changes. A model trained with small micro-batches gives worse long answers.",
        "Two micro-batches have 10 and 90 supervised tokens. How much should one token of each count? Look for the "
        "functions that compute the numerator and the denominator of the loss of a step.",
        "loss.py, total_weight() and token_loss(); engine.py, first docstring; the loop of train_align.py"),
    "leak": Exercise(
        "leak between packed samples", "data.py",
        "at - lo, lo.int(), hi.int()", "at - lo, torch.zeros_like(lo).int(), hi.int()",
        ("test_data.py::test_a_packed_stream_keeps_its_samples_apart",
         "test_model.py::test_a_document_does_not_affect_the_others"),
        "The loss of a sample depends on which samples stand before it in the same stream. With max_tokens so small "
        "that a stream holds one sample, the loss of the same model on the same data is another.",
        "Each token attends to the keys lo <= j < hi of the stream. Which keys belong to the same sample?",
        "kernels/attention.py and parts/spans.py, first docstrings; docs/lecture/stream.svg"),
    "lora": Exercise(
        "LoRA scale", "lora.py",
        "self.scale, self.dropout = alpha / r, dropout", "self.scale, self.dropout = alpha, dropout",
        ("test_lora.py::test_a_wrapped_layer_computes_the_paper",),
        "Stage 2 with lora_r=32 needs a far smaller learning rate than with the peft library. An adapter that peft "
        "trained gives other answers here, although each of its tensors was loaded.",
        "y = W x + b + s B A x. In the paper, s does not only depend on alpha.",
        "lora.py, first docstring (Hu et al. 2021, section 4.1)"),
    "cache": Exercise(
        "cache slots", "generate.py",
        "cache.slot = (lo + pos).to(device)", "cache.slot = pos.to(device)",
        ("test_generate.py::test_a_batch_answers_as_each_alone",),
        "A question that is asked alone gets a good answer. In a batch with others, its answer is another one. So the "
        "score of an evaluation depends on its batch size.",
        "The keys and values of all conversations of a batch are in one tensor. Where does each conversation begin? "
        "Where are new keys written?",
        "generate.py, class Cache"),
    "truncate": Exercise(
        "an image cut by truncation", "chat.py",
        """            n = min(n, begin)
            break
""",
        """            break
""",
        ("test_chat.py::test_truncation_never_cuts_an_image",),
        "After hours, training stops: 'there are more image placeholders than image features'. The step that fails "
        "has a long conversation with several images. With a larger max_len, the error does not occur.",
        "max_len may fall between two placeholders of one image. What remains of this image in the ids, and what in "
        "the list of images?",
        "chat.py, truncate()")}
