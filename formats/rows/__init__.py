"""Data files: where their rows are (Rows, Parquet, Tar, Shards), and what a row contains (conversation).

    open_mixture(spec)   several files with shares -> files, samples per epoch, weights
    open_rows(name)      a file, or a pattern such as "shards/*.parquet" -> an object with

        len(rows), rows[i]    a row is a dict; it is read when it is asked for
        rows.file             the name
        rows.bytes            size of all files
        rows.guess(i)         bytes of text and number of images, roughly, without reading the row
        rows.has_images()     (len,) bool, for order=by_modality
        rows.digest(h)        update a hash with the contents (index.py says which change it can miss)

    ORDERS               which samples make up a step
"""

from formats.rows.conversations import ASSISTANT, conversation
from formats.rows.lines import Rows
from formats.rows.mixture import open_mixture, token_rates
from formats.rows.order import ORDERS
from formats.rows.shards import open_rows

__all__ = ["ASSISTANT", "ORDERS", "Rows", "conversation", "open_mixture", "open_rows", "token_rates"]
