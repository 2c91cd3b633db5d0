"""Turn an index and a layout into parts.

plan        which bytes of the source go where in which part
mover       carries a plan out
staging     keeps unfinished files apart until all are whole
side_files  config.json, tokenizer and the like
conduct     threads of a long job, and who is told of its progress
"""
