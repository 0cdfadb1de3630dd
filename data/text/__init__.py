"""Text tokenised while training, for sources too large to prepare, or not worth it.

    sources --------> plan.py      units of at most some megabytes, planned once from sizes and footers
      |
      |   heldout.py               documents to validate on, tokenised once
      v
    V virtual streams              units are dealt to them anew every epoch
      |   reader.py, feed.py       rows of a unit in an order of their own -> BOS ids EOS -> sequences
      |   deal.py                  turn by turn, a sequence of every stream; its source by the exact mixture
      |   worker.py, workers.py    in processes that each serve some of a rank's streams
      v
    TextLoader                     loader.py, cursor.py: steps, and the position of the first token not read yet

The streams do not depend on how many ranks and workers serve them, so neither do the global batches.
"""
