"""One run against another: what `gate --baseline` reads, how it decides, what a promoted baseline holds.
No torch.
"""
