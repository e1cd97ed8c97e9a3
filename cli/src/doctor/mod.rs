use crate::args::Global;
use crate::error::Failure;
pub fn run(_: &Global) -> Result<(), Failure> {
    Ok(())
}
