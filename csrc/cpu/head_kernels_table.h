// The table of the instruction set that the including file is compiled for.
namespace pk {

#define PK_PASTE(a, b) a##b
#define PK_TABLE(isa) PK_PASTE(head_kernels_, isa)
#define PK_STRING(text) #text
#define PK_NAME(isa) PK_STRING(isa)

extern const HeadKernels PK_TABLE(PK_ISA);
const HeadKernels PK_TABLE(PK_ISA) = {PK_NAME(PK_ISA),
                                      PK_ISA::kPanel,
                                      PK_ISA::kStrip,
                                      PK_ISA::kPerWord,
                                      4 / PK_ISA::kPerWord,
                                      nullptr,
                                      nullptr,
                                      PK_ISA::rows_of<PK_ISA::kPanel>,
                                      PK_ISA::columns_of<PK_ISA::kPanel>,
                                      PK_ISA::rows_of<PK_ISA::kStrip>,
                                      PK_ISA::columns_of<PK_ISA::kStrip>,
                                      PK_ISA::product,
                                      PK_ISA::product_of_tiles,
                                      PK_ISA::finish,
                                      PK_ISA::softmax,
                                      PK_ISA::merge,
                                      PK_ISA::gradient,
                                      PK_ISA::convert};

}  // namespace pk
