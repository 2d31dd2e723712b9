#[hopline::service(name = "a", name = "b")]
trait Demo {
    async fn put(&self);
}

fn main() {}
