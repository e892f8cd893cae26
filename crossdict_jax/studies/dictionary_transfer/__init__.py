"""One model's dictionary used for another model, through affine maps."""
