"""`prothpc filter`: sequences too similar to others, found by BLASTP or MMseqs2.

`stage` is the whole in order; `options` is what a user may ask, `sequences` gives records their
ordinals, `tools` runs the programs, `hits` reads what they found, `reduction` picks a
non-redundant set, `report` writes what comes out, `work` is the directory of an unfinished search.
"""
