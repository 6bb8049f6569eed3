/* Reads 64 pixels (0…16) and prints which digit they show. */
#include "model.h"
#include <stdio.h>

int main(void)
{
    static float pixels[DIGITS_INPUT_SIZE], scores[DIGITS_OUTPUT_SIZE];
    int i, best = 0;
    for (i = 0; i < DIGITS_INPUT_SIZE; i++) {
        if (scanf("%f", &pixels[i]) != 1)
            return 2;
        pixels[i] = (pixels[i] / 16.0f - 0.5f) / 0.5f;
    }
    digits_run(pixels, scores);
    for (i = 1; i < DIGITS_OUTPUT_SIZE; i++)
        best = scores[i] > scores[best] ? i : best;
    printf("%d\n", best);
    return 0;
}
