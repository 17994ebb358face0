"""The jobs; what several of their tests need."""


def queue_of(generate):
    """`answering.queue`, batch by batch, by (lm, policy, plan, prompts, keys, limit) -> tokens."""

    def queue(model, policy, plan, shape, asked):
        for start in range(0, len(asked), shape.rows):
            prompts, keys = zip(*asked[start : start + shape.rows], strict=True)
            limit = [shape.new_tokens] * len(prompts)
            yield list(enumerate(generate(model.lm, policy, plan, prompts, keys, limit), start))

    return queue
