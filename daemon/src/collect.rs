//! The last stage, as far as it exists: taking an image away because an admin says so. (The spool trims itself.)

use berth_client::api::{ErrorBody, ErrorKind};

use crate::catalogue::{Catalogue, ImageRow};
use crate::seal::protocol::{Answer, Request};
use crate::sealer::Sealer;

/// Has the sealer take the image's record away and put its data into the trash, and forgets it.
pub async fn remove(
    sealer: &Sealer,
    catalogue: &Catalogue,
    image: &ImageRow,
) -> Result<(), ErrorBody> {
    let request = Request::Remove {
        manifest: image.manifest,
        platform: image.platform.clone(),
    };
    match sealer.request(&request, Vec::new(), |_| {}).await? {
        Answer::Removed { .. } => {}
        _ => {
            return Err(ErrorBody {
                kind: ErrorKind::Internal,
                message: "the sealer answered something else".into(),
                hint: None,
            });
        }
    }
    catalogue
        .remove_image(&image.manifest, &image.platform)
        .await?;
    Ok(())
}
