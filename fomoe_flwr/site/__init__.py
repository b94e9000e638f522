"""A site without Flower.

One message in, one answer out (`work`); what it keeps between them, on its disk (`state`) and in its process
(`memory`); and who it is (`identity`).
"""
