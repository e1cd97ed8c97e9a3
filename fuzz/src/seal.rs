//! The sealer's own files, without the daemon around them.

#[path = "../../daemon/src/seal/manifest.rs"]
#[allow(dead_code, reason = "sealing uses more of it")]
mod manifest;
#[path = "../../daemon/src/seal/protocol.rs"]
#[allow(dead_code, reason = "the sealer's server uses more of it")]
pub mod protocol;

/// Digests of the layers, base first.
pub fn read(
    request: &protocol::SealRequest,
) -> Result<Vec<berth_image::Digest>, protocol::SealFailure> {
    let image = manifest::read(request)?;
    Ok(image.layers.iter().map(|l| l.digest).collect())
}
