"""A site's rows become training sequences: read, split, templated, tokenised, packed, batched.

========================  ===========================================================================================
``readers``               files -> records: .jsonl .json .csv .parquet .txt
``rows``                  records -> ``Example``, the one shape of a row: turns of a conversation, or text
``splits``                which examples are validation; those are never trained on
``templates``             an example -> segments of text, each prompt or answer
``tokenise``              segments -> token ids and labels, loss on the answers only
``packing``               several examples a sequence, kept apart by attention
``batches``               sequences -> the steps of a round, each rank its share
``site_data``             all but the last two in one call, with the counts that are reported
========================  ===========================================================================================

``readers``, ``rows``, ``splits`` and ``templates`` need neither torch nor numpy, so the daemon's commands may import
them.
"""
