mod rules;
mod scanning;
mod tools;
