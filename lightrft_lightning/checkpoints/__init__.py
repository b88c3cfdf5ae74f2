"""The format of checkpoints, apart from any back end: what a rank holds (`flat`, `state`), files (`folder`, `store`),
what a Trainer saves (`trainer_state`), the formats of others (`foreign`).
"""
