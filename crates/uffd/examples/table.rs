//! Prints which features this machine has, for this process: `cargo run -p pagekit-uffd --example table`.

fn main() {
    let support = uffd::Support::probe();
    for (feature, state) in support.rows() {
        println!("{:20} {:5} {state:?}", feature.name, feature.since);
    }
    for name in support.unknown().names() {
        println!("{name:20} newer Have");
    }
}
