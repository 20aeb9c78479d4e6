"""Codecs that store numbers in 16, 8 or 4 bits, with stochastic rounding."""

from memopt.state.codecs.base import AsIs as AsIs
from memopt.state.codecs.base import Codec as Codec
from memopt.state.codecs.base import Coded as Coded
from memopt.state.codecs.base import bits_of as bits_of
from memopt.state.codecs.bfloat16 import BFloat16 as BFloat16
from memopt.state.codecs.bfloat16 import BFloat16AndRemainder as BFloat16AndRemainder
from memopt.state.codecs.blockwise import BLOCK as BLOCK
from memopt.state.codecs.blockwise import LANES as LANES
from memopt.state.codecs.blockwise import SUBLANES as SUBLANES
from memopt.state.codecs.blockwise import Asymmetric as Asymmetric
from memopt.state.codecs.blockwise import Blockwise as Blockwise
from memopt.state.codecs.blockwise import Float8 as Float8
from memopt.state.codecs.blockwise import Integers as Integers
from memopt.state.codecs.blockwise import Mapped as Mapped
from memopt.state.codecs.by_name import Named as Named
from memopt.state.codecs.by_name import named as named
from memopt.state.codecs.gram import Gram as Gram
from memopt.state.codecs.published import Companded as Companded
from memopt.state.codecs.published import DynamicTree as DynamicTree
from memopt.state.codecs.row_scaled import Dynamic as Dynamic
from memopt.state.codecs.row_scaled import Tapered as Tapered
