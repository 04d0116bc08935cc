//! Arrays like those of an append: what a torn record leaves of them may look like anything.

const ZIPF: f64 = 1.3;

/// A vocabulary of today's models, and one of yesterday's.
pub const VOCABULARIES: [u64; 2] = [150_000, 32_000];

fn random(seed: u64) -> impl Iterator<Item = u64> {
    // `SplitMix64`.
    let mix = |mut x: u64| {
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    (1_u64..).map(move |i| mix(seed.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15))))
}

/// `count` int32 ids below `vocabulary`, as frequent as those of a text, and then as many float32 log-probs.
pub fn run(count: usize, vocabulary: u64, seed: u64) -> Vec<u8> {
    let uniform = random(seed).map(|draw| (draw >> 11) as f64 / (1_u64 << 53) as f64);
    let ids = uniform.map(|u| ((1.0 - u).powf(-1.0 / (ZIPF - 1.0)) - 1.0) as u64 % vocabulary);
    let ids: Vec<i32> = ids.take(count).map(|id| id as i32).collect();
    let logprobs = ids.iter().flat_map(|id| (-((id % 1021) as f32) / 64.0).to_le_bytes());
    ids.iter().flat_map(|id| id.to_le_bytes()).chain(logprobs).collect()
}
