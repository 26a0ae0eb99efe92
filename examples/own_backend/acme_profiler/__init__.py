"""A backend of your own: it runs the packed program on torch and says which calls take longest.

    mpqc compile fashion-unet -o out.mpq --recipe w8a8 --target profiler
    mpqc generate out.mpq -o grid.png

Three entry points make it up (pyproject.toml): a target that users name, a backend that builds artifacts for it, and an
executor that runs them. They are three modules because each is imported where the others are not: targets are listed
without torch, and a device that runs artifacts does not compile any.
"""
