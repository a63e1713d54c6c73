"""Objects of a node that is lost are still there; a script, since it needs a cluster of its own."""

import numpy as np
import ray
from ray.cluster_utils import Cluster

from rlsys.actors.keepers import Keepers

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
second = cluster.add_node(num_cpus=1, resources={"second": 1})
ray.init(address=cluster.address, log_to_driver=False)


@ray.remote(num_cpus=0, resources={"second": 1})
class Rank:
    def take(self):
        return np.arange(1_000_000), ray.get_runtime_context().get_node_id()


rank = Rank.remote()
state, node = rank.take.options(num_returns=2).remote()
keepers = Keepers()
keepers.keep("rank 0", state, node=ray.get(node))
((place, keeper),) = keepers._keepers.values()
assert place != ray.get(node)
ray.get(keeper.__ray_ready__.remote())
ray.get(keeper.keep.remote(state))
cluster.remove_node(second, allow_graceful=False)
found = ray.get(state, timeout=60)
print("kept", int(found.sum()))
