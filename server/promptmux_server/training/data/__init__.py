"""Training data: files of several formats, checked before anything is learned, in an order that a seed decides.

From a file to a batch: `source` opens it by lines (`lines`, and a format: `ofa_tsv`, `jsonl`, `coco`), `survey` looks
at all of them once, `stream` mixes and shuffles what is good, `encode` makes examples of it, `batches` adds pictures.
"""
