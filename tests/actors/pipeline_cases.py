"""Pipelines of two stages whose layers are shared unevenly, or in several chunks a rank."""

NUM_LAYERS = 5
ONE_RANK = {}
TWO = {"world_size": 2, "pipeline_parallel_size": 2}
FOUR = {"world_size": 4, "pipeline_parallel_size": 2}
PIPELINES = {
    "uneven": TWO | {"pipeline_layout": "Et|t*4L"},
    "embedding alone": TWO | {"pipeline_layout": "E|t*5L"},
    "VPP 2 x PP 2": TWO | {"pipeline_layout": "Et|tt|t|tL"},
    "VPP 3 x PP 2, loss alone": TWO | {"pipeline_layout": "Et|t|t|t|t|L"},
    "VPP 2 x PP 2 x TP 2": FOUR | {"pipeline_layout": "Et|tt|t|tL", "tensor_parallel_size": 2},
    "VPP 2 x PP 2 x DP 2": FOUR
    | {
        "pipeline_layout": "Et|tt|t|tL",
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    },
}
