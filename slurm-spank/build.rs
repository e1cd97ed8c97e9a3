//! Bindings from the installed Slurm's own header, and the linking that slurmstepd needs.
//!
//! `BERTH_SLURM_INCLUDE` names the folder that holds `slurm/spank.h` when it is not the compiler's default: one build
//! per Slurm release (YY.MM), from one source.

use std::env;
use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=BERTH_SLURM_INCLUDE");

    let mut builder = bindgen::Builder::default()
        .header_contents("spank_berth.h", "#include <slurm/spank.h>\n")
        .allowlist_function("spank_(context|option_register|get_item|getenv|setenv|unsetenv)")
        .allowlist_type("spank_(item|context|option)")
        .allowlist_var("SLURM_VERSION_NUMBER")
        .default_enum_style(bindgen::EnumVariation::ModuleConsts)
        .blocklist_type("spank_err_t|slurm_err_t")
        .raw_line("/// Slurm's error number; the enum behind it grows with every release.\npub type spank_err_t = ::std::os::raw::c_int;")
        .generate_comments(false)
        .merge_extern_blocks(true)
        .layout_tests(false);
    if let Ok(folder) = env::var("BERTH_SLURM_INCLUDE") {
        println!("cargo:rerun-if-changed={folder}/slurm/spank.h");
        builder = builder.clang_arg(format!("-I{folder}"));
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    builder
        .generate()
        .expect("slurm/spank.h must be installed (Debian: libslurm-dev; Rocky: slurm-devel)")
        .write_to_file(out.join("spank.rs"))
        .expect("OUT_DIR is writable");

    // A symbol that an older Slurm lacks must not make the loader refuse the plugin: an `optional` plugin that is not
    // loaded means a job on the host. rustc asks for full RELRO (BIND_NOW) unless told otherwise here.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,lazy");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,relro");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,spank_berth.so");
}
