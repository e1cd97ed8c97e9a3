//! Layers of every kind through the converter: one program, so that it is linked once.

mod ahead;
mod build;
mod cage;
mod floods;
mod formats;
mod hostile;
mod image;
mod oracle;
mod policies;
mod program;
mod umoci;
