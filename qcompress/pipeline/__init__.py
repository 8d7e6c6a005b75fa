"""Pipeline of a recipe from the float model to the verdict: stages, cache keys, trackers, sensitivity
studies.
"""
