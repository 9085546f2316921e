"""Operations on tensors that methods share. None knows a method.

`tasks.py` runs a function for each task, in a loop or by `vmap`; `inner_loop.py` takes inner steps; `draws.py` draws random numbers that
belong to a task; `support.py` keeps what depends on a support set alone. `batch_norm.py` has the norms, of which `second_order.py` is the
kernel, `pooled_norm.py` that of large batches with a max-pool behind them, and `running_averages.py` what several processes make of
them; `modes.py` switches between training and evaluation.
`prototypes.py`, `soft_k_means.py`, `transport.py` and `solvers.py` classify by features; `linear_head.py`, `online.py` and `adam.py` train
heads; `optimizers.py` has torch's optimisers without its compiler. `measures.py` names what is measured, `metrics.py` measures it with
intervals, `calibration.py` and `certainty.py` say how far probabilities can be trusted; `numerics.py` has what is smaller.
"""
