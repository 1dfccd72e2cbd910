"""Picture-caption data: shards, the training order, folders of pictures, reports. It knows no model."""
