"""The loss of an image classifier, as the tests of training and of the duel both take it."""

from jaxnets import losses, metrics, ops


def make_loss_fn(apply_fn, label_smoothing=0.0):
    def loss_fn(params, model_state, batch, *, key):
        logits_BV, model_state = apply_fn(
            params,
            model_state,
            ops.normalize_images(batch["image"]),
            train=True,
            key=key,
            rows=batch["index"],
            mask=batch["mask"],
        )
        loss = losses.softmax_cross_entropy(logits_BV, batch["label"], label_smoothing=label_smoothing)
        accuracy = metrics.Mean.of(metrics.is_correct(logits_BV, batch["label"]), batch["mask"])
        return {"loss": loss}, model_state, {"accuracy": accuracy}

    return loss_fn
