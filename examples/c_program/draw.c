/* Draws with a compiled denoiser from C: no Python, no TVM, one static library and the weights.
 *
 *   mpqc compile fashion-unet -o unet.mpq --emit c
 *   cmake -S examples/c_program -B build -DARTIFACT=$PWD/unet.mpq && cmake --build build
 *   build/draw unet.mpq/weights.safetensors
 *
 * The loop is a plain DDIM of ten steps on the usual "scaled linear" schedule of noise. A real program takes the
 * schedule from the artifact's manifest.json, as `mpqc generate` does; docs/standalone.md says what else mpq.h has. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mpq.h"

enum { TRAINED = 1000, STEPS = 10 };

/* The share of the signal left at timestep t. */
static double signal_at(int t) {
    double share = 1;
    for (int i = 0; i <= t; i++) {
        double root = sqrt(0.0001) + (sqrt(0.02) - sqrt(0.0001)) * i / (TRAINED - 1);
        share *= 1 - root * root;
    }
    return share;
}

/* Roughly normal noise: the sum of twelve uniform numbers. */
static float noise(void) {
    double sum = -6;
    for (int i = 0; i < 12; i++) sum += rand() / (double)RAND_MAX;
    return (float)sum;
}

int main(int count, char **arguments) {
    if (count != 2) return fprintf(stderr, "usage: draw weights.safetensors\n"), 2;

    int functions;
    const mpq_function *function = mpq_functions(&functions); /* [0]: the smallest batch */
    mpq_model *model = mpq_open(arguments[1], /* threads */ 1);
    if (!model) return fprintf(stderr, "%s\n", mpq_error()), 1; /* one sentence: what is wrong with CPU or file */

    /* Inputs by position: the latents first, then the timestep; conditions, such as class labels, are zeros here. */
    const void *inputs[16];
    float *latents = NULL;
    void *timestep = NULL;
    for (int i = 0; i < function->inputs; i++) {
        const mpq_tensor *input = &function->input[i];
        void *buffer = calloc(1, input->bytes);
        if (!buffer || i == 16) return fprintf(stderr, "no room for %s\n", input->name), 1;
        if (i == 0) latents = buffer;
        if (!strcmp(input->name, "timestep")) timestep = buffer;
        inputs[i] = buffer;
    }
    size_t values = function->output.bytes / sizeof(float);
    float *output = malloc(function->output.bytes);
    if (!output || !latents || !timestep) return fprintf(stderr, "no latents or no timestep among the inputs\n"), 1;
    for (size_t i = 0; i < values; i++) latents[i] = noise();

    for (int step = STEPS - 1; step >= 0; step--) {
        int t = step * (TRAINED / STEPS), before = t - TRAINED / STEPS;
        double signal = signal_at(t), next = before < 0 ? 1 : signal_at(before);
        if (!strcmp(function->input[1].dtype, "F32"))
            *(float *)timestep = (float)t;
        else
            *(int64_t *)timestep = t;
        if (mpq_run(model, 0, inputs, output)) return fprintf(stderr, "%s\n", mpq_error()), 1;
        for (size_t i = 0; i < values; i++) { /* the output is the noise that the model sees in the latents */
            double image = (latents[i] - sqrt(1 - signal) * output[i]) / sqrt(signal);
            latents[i] = (float)(sqrt(next) * image + sqrt(1 - next) * output[i]);
        }
    }

    double sum = 0, squares = 0;
    for (size_t i = 0; i < values; i++) sum += latents[i], squares += (double)latents[i] * latents[i];
    printf("%s: %zu values, mean %.4f, root mean square %.4f\n", function->name, values, sum / values, sqrt(squares / values));
    mpq_close(model);
    return 0;
}
