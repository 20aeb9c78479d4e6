# docker build --tag memopt .                                            for CPUs
# docker build --tag memopt --build-arg EXTRAS=train,cuda13 .            for NVIDIA GPUs
# docker run --rm --volume runs:/home/memopt/runs memopt pretrain        --gpus all for GPUs
# The driver of a GPU is the host's; CUDA comes with JAX.
FROM python:3.13-slim

ARG EXTRAS=train
COPY . /opt/memopt
RUN pip install --no-cache-dir --constraint /opt/memopt/constraints.txt "/opt/memopt[${EXTRAS}]" \
    && useradd --uid 1000 --create-home memopt

USER 1000
WORKDIR /home/memopt
RUN mkdir runs
ENTRYPOINT ["memopt"]
CMD ["--help"]
