/* What a Cortex-M does before main: variables are copied to memory, the floating-point unit is switched on. */
#include <stdint.h>

extern uint32_t data_from[], data_begin[], data_end[], stack_top[]; /* mps2.ld has them */
void _start(void);                                                  /* the C library's: clears memory, calls main */
void reset(void);

void reset(void)
{
    const uint32_t *from = data_from;
    uint32_t *to;
#ifdef __ARM_FP
    *(volatile uint32_t *)0xe000ed88u |= 0xfu << 20; /* CPACR */
    __asm volatile("dsb\n\tisb");
#endif
    for (to = data_begin; to < data_end; to++)
        *to = *from++;
    _start();
}

static void fault(void)
{
    for (;;) {
    }
}

typedef void (*handler)(void);
__attribute__((used, section(".vectors"))) static const struct {
    uint32_t *stack;
    handler others[15];
} vectors = {stack_top, {reset, fault, fault, fault, fault, fault}};
