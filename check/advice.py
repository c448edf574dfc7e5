"""For each check: what its failure means for training or answers, and what to do about it."""

ADVICE = {
    "causality": (
        "A token's prediction depends on later tokens, or on another row. In training the model sees the answer, so "
        "its loss is too low; when it writes, the answer is not there, and the text is poor. Scores from such "
        "training mean nothing. Look at the causal mask, at transposes around attention, and at layers that mix "
        "positions."
    ),
    "cached_decoding": (
        "With a cache, as `generate` and every server use it, the model computes something else than in training, so "
        "answers get worse with their length. Look at the positions and the mask of tokens after cached ones. Until "
        "then generate with use_cache=False."
    ),
    "left_padding": (
        "In a batch, a short prompt gets another answer than alone, because padding is attended to or shifts "
        "positions. Apply attention_mask in attention. Until then generate, evaluate and run GRPO with batches of "
        "one prompt."
    ),
    "packed_documents": (
        "Documents packed into one row read each other, because the model builds no mask from restarting "
        "position_ids. Do not pack with this model (`packing=False`), or use an attention that separates documents."
    ),
    "position_ids": (
        "The model accepts position_ids and ignores them. Left padding and packing, which rely on them, get wrong "
        "positions without an error. Compute the rotation from position_ids, or do not accept the argument."
    ),
    "loss_accumulation": (
        "The loss ignores num_items_in_batch, or is no mean cross entropy of the next token. A model that takes "
        "**kwargs receives num_items_in_batch from the Trainer of transformers, which then does not divide the loss "
        "itself: with N accumulation steps loss and gradient are about N times too large, and short rows weigh more "
        "than long ones. Sum the cross entropy and divide by num_items_in_batch if it is given; or set "
        "`accepts_loss_kwargs = False` in the class, which at least keeps the size right."
    ),
    "tied_weights": (
        "What is loaded is not what was saved, or embedding and head are tied although the config says otherwise (or "
        "the reverse). The model answers worse after loading. Name tied tensors in `_tied_weights_keys`, and "
        "register every tensor that belongs to the model as a parameter or persistent buffer."
    ),
    "loaded_buffers": (
        "After from_pretrained a buffer that is not in the file, often a rotary table, holds whatever was in memory: "
        "by luck zeros, else random numbers. Then positions are lost and answers are nonsense, in one load and not "
        "in the next. Set the buffer in `_init_weights`, which transformers 5 calls after loading, or register it as "
        "persistent."
    ),
    "fresh_process": (
        "Who downloads the model cannot load it, or gets other answers. Look at `auto_map` and at whether the code "
        "in the folder is that of the model."
    ),
    "parameter_gradients": (
        "The named parameter learns nothing from the text: its gradient is zero or rounding noise. The usual case is "
        "a router with one expert per token and normalized weights: the weight is always 1, so nothing tells the "
        "router which expert is better (a balancing loss only spreads tokens evenly). Choose two experts per token "
        "or do not normalize. A parameter that nothing uses can be removed. A bias of the keys without rotary "
        "positions has no effect by nature and does no harm."
    ),
    "attention_backends": (
        "Training and serving give different results if they use different attention implementations (eager, sdpa, "
        "flex_attention). Look at scale, mask and softcap of the one that differs; until then use eager everywhere."
    ),
    "experts_backends": (
        "The experts give different results in different implementations, so serving differs from training. Look at "
        "the one that differs from eager; until then use eager everywhere."
    ),
    "gradient_checkpointing": (
        "With gradient checkpointing the model trains on another gradient. Recomputing a layer must give the same "
        "result: look for counters, caches and random numbers inside layers. Until then train without it."
    ),
    "bfloat16": (
        "In bfloat16 the model computes much less precisely than the format allows, often because angles of "
        "positions are computed in it: far into the context, neighbouring positions become one. Compute positions, "
        "norms and router scores in float32. Until then train and serve in float32."
    ),
    "determinism": (
        "The same step twice gives different results: runs cannot be reproduced or resumed exactly. Look for random "
        "numbers that do not come from torch's seeded generator, and for state that a step changes."
    ),
    "initial_loss": (
        "A new model is far from guessing all tokens equally, so the first steps go into undoing that, and may "
        "diverge. Look at the initializer's standard deviation, at the scale of the logits, and at whether the loss "
        "is shifted."
    ),
    "router_choice": (
        "The router sends tokens to other experts, or weights them otherwise, than its scores say. Compare its "
        "top-k, groups and normalization with the formulas of the architecture."
    ),
}
