//! Which tensor gets which type: llama.cpp's mixes (`llama-quant.cpp`), as a table.

use super::kinds::{Kind, ty};
use crate::bad_file;
use crate::error::{Result, excerpt};
use crate::gguf::{Gguf, Tensor, Value};
use crate::quant::Type;

/// What a matrix is for, as far as types depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// The output, and embeddings that are the output as well.
    Output,
    Embedding,
    /// Values, also where they are fused with queries and keys.
    Values,
    Keys,
    Queries,
    AttnOutput,
    Up,
    Gate,
    Down,
    Other,
}

use Place::*;

/// Embeddings of tokens.
const EMBEDDINGS: [&str; 2] = ["token_embd.weight", "per_layer_token_embd.weight"];

/// Parts of names, the first that is found counts.
const PLACES: &[(&str, Place)] = &[
    ("attn_qkv.weight", Values),
    ("attn_kv_b.weight", Values),
    ("attn_v.weight", Values),
    ("attn_k.weight", Keys),
    ("attn_q.weight", Queries),
    ("attn_output.weight", AttnOutput),
    ("ffn_up", Up),
    ("ffn_gate", Gate),
    ("ffn_down", Down),
];

/// Whole names of matrices that stay as they are.
const KEPT: &[&str] = &["position_embd.weight", "token_types.weight"];

/// Parts of names of such matrices: norms, routers, tables, and what is small and delicate.
const KEPT_PARTS: &[&str] = &[
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_first.weight",
    "time_mix_w0.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
];

/// The architecture with more of them, and with some that get 8 bits at least.
const DELICATE: &str = "glm5-next";
const KEPT_DELICATE: &[&str] = &[
    "hc_",
    "indexer.attn_q_b",
    "indexer.attn_k",
    "indexer.proj",
    "indexer_compressor_gate",
    "indexer_compressor_ape",
    "ssm_f_a.weight",
    "ssm_f_b.weight",
    "ssm_g_a.weight",
    "ssm_g_b.weight",
    "ssm_beta.weight",
    "attn_kv_a_mqa.weight",
    "attn_k_b.weight",
    "attn_v_b.weight",
];
const EIGHT_BITS: &[&str] = &["attn_q_a", "attn_q_b", "nextn.eh_proj"];

/// Architectures, and layers, of models of 70 billion parameters.
const LARGE: &[(&str, usize)] =
    &[("llama", 80), ("llama-embed", 80), ("qwen2", 80), ("deci", 80), ("olmo", 80), ("jais2", 68)];

/// What else a rule asks for. Layers are counted from 0; with experts, by their numbers, since several
/// matrices of a layer count as one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// Rows are not whole blocks of the kind's type.
    Ragged,
    /// Four or more query heads share a kv head.
    Grouped,
    /// Four or more experts.
    FourExperts,
    EightExperts,
    NotEightExperts,
    Falcon,
    NotFalcon,
    Importance,
    NoImportance,
    /// So many matrices come before, at most.
    After(usize),
    /// In the first of so many parts of the layers.
    Early(usize),
    /// The same, by the number of such matrices that came before.
    EarlyByCount(usize),
    /// Neither in the first nor in the last eighth.
    Middle,
    /// In the first or the last eighth, or every third between them.
    Favored,
}

use When::*;

/// What matrices of one place in files of some kinds get.
struct Rule {
    place: Place,
    /// None: all.
    kinds: &'static [&'static str],
    when: &'static [When],
    new: &'static Type,
}

const fn rule(
    place: Place,
    kinds: &'static [&'static str],
    when: &'static [When],
    new: &str,
) -> Rule {
    Rule { place, kinds, when, new: ty(new) }
}

/// Kinds of less than 3 bits that are made with lattices.
const LOW: &[&str] = &["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"];
/// The larger of them.
const LOW_S: &[&str] = &["IQ2_S", "IQ2_M"];

/// The first that fits counts; matrices without one get the kind's own type.
static RULES: &[Rule] = &[
    rule(Output, &["MXFP4_MOE", "Q8_0"], &[], "Q8_0"),
    rule(Output, &[], &[Falcon], "Q8_0"),
    rule(Output, &[], &[Ragged], "Q8_0"),
    rule(Output, LOW, &[], "Q5_K"),
    rule(Output, &["IQ3_XXS"], &[], "Q5_K"),
    rule(Output, &[], &[], "Q6_K"),
    rule(Embedding, &["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"], &[], "Q2_K"),
    rule(Embedding, &["IQ2_S", "IQ2_M", "IQ3_XXS"], &[], "IQ3_S"),
    rule(Embedding, &["TQ1_0", "TQ2_0", "Q2_0"], &[], "Q4_K"),
    rule(Values, LOW, &[Grouped], "Q4_K"),
    rule(Values, LOW, &[FourExperts], "Q4_K"),
    rule(Values, LOW_S, &[], "IQ3_S"),
    rule(Values, LOW, &[], "Q2_K"),
    rule(Values, &[], &[EightExperts], "Q8_0"),
    rule(Values, &["Q2_K", "Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S"], &[Grouped], "Q4_K"),
    rule(Values, &["Q2_K"], &[], "Q3_K"),
    rule(Values, &["IQ3_XXS"], &[NoImportance], "IQ3_S"),
    rule(Values, &["IQ3_M"], &[], "Q4_K"),
    rule(Values, &["Q3_K_M"], &[After(1)], "Q5_K"),
    rule(Values, &["Q3_K_M"], &[], "Q4_K"),
    rule(Values, &["Q3_K_L"], &[], "Q5_K"),
    rule(Values, &["IQ4_NL", "IQ4_XS"], &[Grouped], "Q5_K"),
    rule(Values, &["Q4_K_M", "Q5_K_M"], &[Favored], "Q6_K"),
    rule(Values, &["Q4_K_S"], &[After(3)], "Q5_K"),
    rule(Keys, LOW, &[EightExperts], "Q4_K"),
    rule(Keys, &[], &[EightExperts], "Q8_0"),
    rule(Keys, &["IQ3_XS"], &[], "IQ3_XXS"),
    rule(Keys, &["IQ3_XXS"], &[], "IQ2_S"),
    rule(Queries, &["IQ3_XS"], &[], "IQ3_XXS"),
    rule(Queries, &["IQ3_XXS"], &[], "IQ2_S"),
    rule(AttnOutput, LOW, &[EightExperts], "Q5_K"),
    rule(AttnOutput, &["IQ1_S", "IQ1_M"], &[], "IQ2_XXS"),
    rule(AttnOutput, LOW_S, &[], "IQ3_S"),
    rule(AttnOutput, &["Q3_K_L"], &[Falcon], "Q4_K"),
    rule(
        AttnOutput,
        &[
            "Q2_K", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "Q3_K_S", "Q3_K_M", "IQ4_NL", "IQ4_XS",
            "Q4_K_S", "Q4_K_M",
        ],
        &[NotFalcon, EightExperts],
        "Q5_K",
    ),
    rule(AttnOutput, &["Q2_K"], &[NotFalcon, NotEightExperts], "Q3_K"),
    rule(AttnOutput, &["IQ3_XXS"], &[NotFalcon, NotEightExperts], "IQ3_S"),
    rule(AttnOutput, &["Q3_K_M", "IQ3_M"], &[NotFalcon, NotEightExperts], "Q4_K"),
    rule(AttnOutput, &["Q3_K_L"], &[NotFalcon, NotEightExperts], "Q5_K"),
    rule(Up, &["IQ3_XS"], &[Middle], "IQ3_XXS"),
    rule(Gate, &["IQ3_XS"], &[Middle], "IQ3_XXS"),
    rule(Down, LOW_S, &[EarlyByCount(8)], "IQ3_S"),
    rule(Down, LOW, &[EarlyByCount(8)], "Q2_K"),
    rule(Down, &["Q2_K"], &[], "Q3_K"),
    rule(Down, &["Q2_K_S"], &[Early(8)], "Q4_K"),
    rule(Down, &["IQ3_XXS"], &[NoImportance, Early(8)], "Q4_K"),
    rule(Down, &["IQ3_XXS"], &[NoImportance], "Q3_K"),
    rule(Down, &["IQ3_M"], &[Early(8)], "Q4_K"),
    rule(Down, &["IQ3_M"], &[EightExperts, Favored], "Q4_K"),
    rule(Down, &["Q3_K_M"], &[Early(16)], "Q5_K"),
    rule(Down, &["Q3_K_M"], &[NotFalcon], "Q4_K"),
    rule(Down, &["Q3_K_M"], &[Favored], "Q4_K"),
    rule(Down, &["Q3_K_L"], &[Falcon], "Q4_K"),
    rule(Down, &["Q3_K_L"], &[], "Q5_K"),
    rule(Down, &["Q4_K_M"], &[Falcon, Early(16)], "Q6_K"),
    rule(Down, &["Q4_K_M"], &[Falcon, Favored], "Q5_K"),
    rule(Down, &["Q4_K_M"], &[NotFalcon, Favored], "Q6_K"),
    rule(Down, &["Q4_K_S"], &[NotFalcon, Early(8)], "Q5_K"),
    rule(Down, &["Q5_K_M"], &[Favored], "Q6_K"),
    rule(Down, &["IQ4_NL", "IQ4_XS"], &[NoImportance, Early(8)], "Q5_K"),
    rule(Down, &["Q4_0"], &[Importance, Early(8)], "Q4_1"),
    rule(Down, &["Q5_0"], &[Importance, Early(8)], "Q5_1"),
];

/// What a type whose blocks rows do not fill is replaced by.
static SMALLER: &[(&[&str], &Type)] = &[
    (&["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"], ty("IQ4_NL")),
    (&["Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"], ty("Q4_0")),
    (&["Q4_K"], ty("Q5_0")),
    (&["Q5_K"], ty("Q5_1")),
    (&["Q6_K"], ty("Q8_0")),
];

/// Types that are too coarse without importance; embeddings and the output may have them.
const COARSE: &[&str] = &["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"];

/// The type for a tensor whose rows may not be whole blocks of the one that was wanted.
pub(super) fn that_fits(tensor: &Tensor, wanted: &'static Type) -> Result<&'static Type> {
    let n = tensor.dims.first().copied().unwrap_or(1);
    let fits = |ty: &Type| n.is_multiple_of(ty.block_len as u64);
    if fits(wanted) {
        return Ok(wanted);
    }
    match SMALLER.iter().find(|(of, _)| of.contains(&wanted.name)) {
        Some((_, smaller)) if fits(smaller) => Ok(smaller),
        None if wanted.block_len > 32 => bad_file!(
            "tensor \"{}\" has rows of {n} elements, not whole blocks of {} ({}), and no other type \
             stands for that one",
            excerpt(&tensor.name),
            wanted.block_len,
            wanted.name
        ),
        _ => Ok(ty("F16")),
    }
}

/// Whether a tensor of this type is no use without importance.
pub(super) fn needs_importance(name: &str, new: &Type, kind: &Kind) -> bool {
    let is_spared = name == "output.weight" || EMBEDDINGS.contains(&name);
    !is_spared && (COARSE.contains(&new.name) || (new.name == "Q2_K" && kind.name == "Q2_K_S"))
}

/// What of a model its types depend on.
pub(super) struct Mix<'a> {
    kind: &'a Kind,
    arch: &'a str,
    n_layer: usize,
    n_gqa: usize,
    n_expert: usize,
    has_importance: bool,
    /// Embeddings are the output as well.
    is_tied: bool,
    /// Matrices that make values, all and those that came before.
    n_values: usize,
    seen: Vec<Place>,
    is_large: bool,
}

impl<'a> Mix<'a> {
    pub(super) fn new(gguf: &'a Gguf, kind: &'a Kind, has_importance: bool) -> Result<Mix<'a>> {
        let Some(arch) = gguf.str("general.architecture")? else {
            bad_file!("key \"general.architecture\" is missing: not a model");
        };
        // Of several numbers, that of the first layer.
        let number = |name: &str| -> Option<usize> {
            let value = match gguf.get(&format!("{arch}.{name}"))? {
                Value::Array(array) => array.iter().next()?,
                value => value,
            };
            usize::try_from(value.integer()?).ok()
        };
        let Some(n_layer) = number("block_count") else {
            bad_file!("key \"{arch}.block_count\" is missing");
        };
        let n_head = number("attention.head_count").unwrap_or(0);
        let n_kv = number("attention.head_count_kv").unwrap_or(n_head);
        let of_llama = arch == "llama" || arch == "llama-embed";
        let n_expert = number("expert_count").unwrap_or(0);
        let is_values = |t: &&Tensor| place(&t.name) == Values;
        Ok(Mix {
            kind,
            arch,
            n_layer,
            n_gqa: n_head.checked_div(n_kv).unwrap_or(0),
            n_expert,
            has_importance,
            is_tied: gguf.tensor("output.weight").is_none(),
            n_values: gguf.tensors().iter().filter(is_values).count(),
            seen: Vec::new(),
            is_large: LARGE.contains(&(arch, n_layer))
                && !(of_llama && (n_head == n_kv || n_expert == 8)),
        })
    }

    /// Whether a tensor may get another type at all.
    pub(super) fn changes(&self, tensor: &Tensor) -> bool {
        let has = |part: &&str| tensor.name.contains(part);
        let is_kept = KEPT.contains(&tensor.name.as_str())
            || KEPT_PARTS.iter().any(has)
            || (self.arch == DELICATE && KEPT_DELICATE.iter().any(has));
        let is_matrix = tensor.dims.iter().skip(1).any(|n| *n > 1);
        is_matrix && tensor.name.ends_with("weight") && !is_kept
    }

    /// Whether a tensor is embeddings of tokens that are the output as well.
    pub(super) fn is_tied_output(&self, tensor: &Tensor) -> bool {
        self.is_tied && is_embedding(&tensor.name)
    }

    /// The type of the next tensor, which [changes](Self::changes).
    pub(super) fn next(&mut self, tensor: &Tensor) -> Result<&'static Type> {
        if self.arch == DELICATE && EIGHT_BITS.iter().any(|part| tensor.name.contains(part)) {
            return Ok(ty("Q8_0"));
        }
        let place = match place(&tensor.name) {
            Embedding if self.is_tied => Output,
            place => place,
        };
        if place != Output && self.kind.name == "MXFP4_MOE" {
            let is_ffn = [Up, Gate, Down].contains(&place) || self.arch != "bailingmoe3";
            let is_experts = tensor.dims.get(2).is_some_and(|n| *n > 1) && is_ffn;
            return Ok(ty(if is_experts { "MXFP4" } else { "Q8_0" }));
        }
        let count = self.seen.iter().filter(|seen| **seen == place).count();
        let layer = match [Up, Gate, Down].contains(&place) && self.n_expert > 1 {
            false => count,
            true => self.layer(&tensor.name)?,
        };
        let all = if place == Values { self.n_values } else { self.n_layer };
        let holds = |when: &When| match *when {
            Ragged => !tensor.dims[0].is_multiple_of(self.kind.base.block_len as u64),
            Grouped => self.n_gqa >= 4,
            FourExperts => self.n_expert >= 4,
            EightExperts => self.n_expert == 8,
            NotEightExperts => self.n_expert != 8,
            Falcon => self.arch == "falcon",
            NotFalcon => self.arch != "falcon",
            Importance => self.has_importance,
            NoImportance => !self.has_importance,
            After(most) => count <= most,
            Early(parts) => layer < all / parts,
            EarlyByCount(parts) => count < all / parts,
            Middle => layer >= all / 8 && layer < 7 * all / 8,
            Favored => layer < all / 8 || layer >= 7 * all / 8 || (layer - all / 8) % 3 == 2,
        };
        let rule = RULES.iter().find(|rule| {
            rule.place == place
                && (rule.kinds.is_empty() || rule.kinds.contains(&self.kind.name))
                && rule.when.iter().all(holds)
        });
        let mut new = rule.map_or(self.kind.base, |rule| rule.new);
        // Values of such models are made by matrices that are small beside the others.
        let is_small = place == Values && self.is_large && !LOW.contains(&self.kind.name);
        if is_small && ["Q3_K", "Q4_K"].contains(&new.name) {
            new = ty("Q5_K");
        }
        self.seen.push(place);
        Ok(new)
    }

    /// The number of a matrix's layer.
    fn layer(&self, name: &str) -> Result<usize> {
        match layer_of(name).filter(|i| *i < self.n_layer) {
            Some(layer) => Ok(layer),
            None => {
                bad_file!("tensor \"{}\" is in none of {} layers", excerpt(name), self.n_layer)
            }
        }
    }
}

/// Whether a tensor is embeddings of tokens.
pub(super) fn is_embedding(name: &str) -> bool {
    EMBEDDINGS.contains(&name)
}

/// The layer in a name, `blk.LAYER.`.
pub(super) fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("blk.")?.split_once('.')?.0.parse().ok()
}

fn place(name: &str) -> Place {
    match PLACES.iter().find(|(part, _)| name.contains(part)) {
        _ if name == "output.weight" => Output,
        _ if is_embedding(name) => Embedding,
        Some((_, place)) => *place,
        None => Other,
    }
}
