"""Operators of TensorRT's ONNX parser with their types: facts of the public support matrix of onnx-tensorrt.

Source: docs/operators.md of onnx-tensorrt for TensorRT 10. Operators whose results change from run to run or whose
output sizes depend on data are left out, whatever the parser says: their numbers cannot be proved.
"""

from __future__ import annotations

FAMILIES = {
    "f": ("FLOAT", "FLOAT16", "BFLOAT16"),
    "h": ("FLOAT", "FLOAT16"),
    "i": ("INT32", "INT64"),
    "b": ("BOOL",),
    "u": ("UINT8",),
    "q": ("INT8",),
}
TABLE = {
    "f": """Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh
        CumSum Dropout Einsum Elu Erf Exp Floor Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool GRU
        GroupNormalization HardSigmoid HardSwish Hardmax InstanceNormalization IsInf LayerNormalization LeakyRelu Log
        LogSoftmax LRN LSTM LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization PRelu Pow QuantizeLinear
        Reciprocal Resize RNN Round Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu""",
    "h": "DeformConv GridSample Mish RoiAlign",
    "fi": """Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean Min Mod
        Mul Neg Pad Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
        ReduceSum ReduceSumSquare Relu ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK""",
    "fib": """Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND Identity OneHot
        Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where""",
    "b": "And Not Or Xor",
    "fibu": "Cast",
    "q": "DequantizeLinear",
}
OPERATORS = {name: families for families, names in TABLE.items() for name in names.split()}
INSTEAD = {
    **dict.fromkeys(
        ("Compress", "NonZero", "NonMaxSuppression", "Unique"),
        "its output size depends on data: end the network before it and do this step in the application",
    ),
    **dict.fromkeys(("If", "Loop", "Scan"), "compute every branch, or unroll the loop"),
    **dict.fromkeys(
        ("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "DynamicQuantizeLinear"),
        "QuantizeLinear and DequantizeLinear with a zero point of 0",
    ),
    **dict.fromkeys(
        ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
        "make the random numbers an input",
    ),
    "MaxUnpool": "Resize, or ConvTranspose",
    "MaxRoiPool": "RoiAlign",
}
ELSEWHERE = "export to another format, or replace the operator in the network"
