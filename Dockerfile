# The compiler with all that `mpqc compile` needs, on CPUs:
#     docker build -t mpqc . && docker run --rm -v "$PWD:/work" mpqc compile emoji -o emoji.mpq --weights 4
FROM python:3.11-slim

# gcc links kernels and C programs; PyTorch's own index has the wheels for CPUs, a tenth of the size.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
    -c /source/constraints.txt '/source[compile]' && rm -rf /source

WORKDIR /work
ENTRYPOINT ["mpqc"]
