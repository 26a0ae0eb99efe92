"""``compile()`` for models, folders and diffusers pipelines."""
