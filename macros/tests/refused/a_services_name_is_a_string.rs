#[hopline::service(name = demo)]
trait Demo {
    async fn put(&self);
}

fn main() {}
