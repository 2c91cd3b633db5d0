"""Index x layout -> parts.

plan        which bytes of the source go where in which part
mover       carries a plan out
staging     a folder that becomes visible when it is whole
side_files  config.json, tokenizer and the like
conduct     the common course of commands that write a folder
"""
